"""Machines and data that come from outside: chat models, SAEs, prompts, and the table that names them."""
