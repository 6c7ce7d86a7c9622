"""Mutations of solved model pairs: words, renamings, kinds, small made cases, and the judge."""
