"""Guard prompts with a block list and Aegis, and videos with a frame filter and a face blur."""
