"""Check this machine and install what is missing.

checks.py gives a verdict on each thing, probes.py tries things in child processes, and installs.py
holds the commands that repair a machine.
"""
