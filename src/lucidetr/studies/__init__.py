"""Experiments that make a table or a figure anew, from nothing."""
