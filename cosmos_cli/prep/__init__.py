"""Turn videos and captions into text embeddings, cached latents, a manifest and a report.

Start with prepare.py. sources.py gives each video its verdict and its clips, caption_choice.py its
caption, latents.py its latents. damage.py finds frames whose damage a decoder conceals.
work_sharing.py lets several processes prepare one dataset.
"""
