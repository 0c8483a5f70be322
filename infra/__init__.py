"""Plumbing: can be believed without being read. Imports nothing from the door or family/."""
