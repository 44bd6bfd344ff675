"""countermark: the client and verifier."""
