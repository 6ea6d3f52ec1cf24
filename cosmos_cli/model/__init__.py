"""The networks and their maths in plain PyTorch. They know no recipe and no run, and print nothing.

Start with edm.py (the loss), dit.py (the denoiser) and sampler.py. tokenizer.py and text.py encode
videos and captions. weights.py, lora_files.py and pretrained.py read files; tensor_names.py maps
the names in them. video.py reads videos and mp4.py writes them. private_names.py lists what we use
of other packages that they do not document.
"""
