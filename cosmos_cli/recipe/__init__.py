"""The recipe: its keys, the rules between them, loading, and the plan of memory, time and disk.

Start with keys.py; a new key goes there, a rule between keys into rules.py. loading.py reads YAML
and --set and names every problem at once. plan.py predicts without a GPU.
"""
