"""Topics for TopicLoRA: what a prompt is about, and which experts that calls for.

vocabulary    which topics there are               encoders, features   topics and prompts as vectors
graph         topics embedded, experts placed      artefact             the result: `Topics`, its file, prompts' targets
"""

from moesaic.lora.methods.topics.artefact import Topics, TopicSettings, build
from moesaic.lora.methods.topics.encoders import Encoder, encoder
from moesaic.lora.methods.topics.vocabulary import PACKAGED

__all__ = ["PACKAGED", "Encoder", "TopicSettings", "Topics", "build", "encoder"]
