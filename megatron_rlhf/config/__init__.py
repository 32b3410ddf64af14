"""Typed configuration: every field has a type, a default where one is safe, and a docstring. Imports no other part of
this package."""
