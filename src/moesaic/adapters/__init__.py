"""Experts are LoRA adapters somebody already trained. Every module of this folder may define a method that routes them.

Any mixture can take `adapters=[...]`: its experts are theirs then, and its router is trained. The methods here need
them: they read the router off the adapters, off what these were trained on, or train it for them.
"""
