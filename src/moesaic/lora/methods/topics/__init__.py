"""Topics for TopicLoRA: what a prompt is about, and which experts that calls for.

settings      how they are made                    vocabulary            which topics there are
graph         topics embedded, experts placed      encoders, features    topics and prompts as vectors
artefact      the result: `Topics`, its file, prompts' targets
"""
