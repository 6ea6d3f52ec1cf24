"""Guardrails: the block list, Aegis, the frame filter and the face blur."""
