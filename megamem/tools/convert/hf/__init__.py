"""Memory models as folders that Hugging Face's transformers loads, and back.

code/        the two files that such a folder contains: the model in plain torch, and its config
settings.py  what a run's arguments mean for the model's config
names.py     the weights by the names of either side
folder.py    writes and reads a folder
"""
