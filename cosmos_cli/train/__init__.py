"""Post-training: from the checks before it starts to the loop, its saves and its page.

Start with loop.py. preflight.py and resumes.py refuse what cannot work, launch.py starts the ranks,
process.py is the process of each of them, and engine.py sets up DeepSpeed. checkpoint.py and
reshard.py save and resume.
"""
