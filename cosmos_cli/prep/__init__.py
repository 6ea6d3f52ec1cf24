"""Videos and captions in; text embeddings, cached latents, a manifest and a report out.

Start with prepare.py. sources.py gives each video its verdict, its clips and its caption.
damage.py finds frames whose damage a decoder conceals. work_sharing.py lets several processes
prepare one dataset.
"""
