"""Router-R1 (Zhang, Feng and You 2025, arXiv 2506.09033): a language model that thinks, asks others, and answers.

Built on the catalog, the gateway and the local pool of `moesaic.llms`.
"""
