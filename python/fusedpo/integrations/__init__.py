"""Adapters for trainers: one thin module each, imported by whoever uses that trainer."""
