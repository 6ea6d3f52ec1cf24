"""Prompts in, mp4 files out.

Start with jobs.py: a line of a batch becomes a job. choice.py picks recipe and weights, batch.py
runs the jobs, phases.py loads the networks and samples, and processes.py spreads jobs over
processes. guards/ holds the guardrails.
"""
