"""Transparency log, pure: RFC 6962 hashing and proofs, C2SP checkpoints and tiles. No I/O, no keys, no clock."""
