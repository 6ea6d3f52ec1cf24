"""Turn prompts into mp4 files.

Start with jobs.py: a request, which is a line of a batch, becomes a job and then a result.
choice.py picks recipe and weights, batch.py runs the jobs, phases.py takes them through
text_models.py and video_models.py, and processes.py spreads them over processes. guards/ holds the
guardrails.
"""
