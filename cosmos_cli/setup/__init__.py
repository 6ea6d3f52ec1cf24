"""Check this machine and install what is missing.

checks.py gives a verdict on the machine and packages.py on each package. probes.py tries things in
child processes, and installs.py holds the commands that repair a machine.
"""
