"""Strict parsing and encoding of every format countermark reads or writes. No signatures, no I/O, no clock."""
