"""The class ArrowQuantV2: one object for weights in arrays, tables, streams and files; docs/arrowquant_v2.md.

Thin over `ops`, `tables` and `pipeline`: what it adds is one set of defaults, results as dicts, and the choice of the
device and the way by what they cost on this machine.
"""
