"""The serving engine of the exact profile: tokens in, tokens and fingerprints out; knows neither gRPC nor attestation."""
