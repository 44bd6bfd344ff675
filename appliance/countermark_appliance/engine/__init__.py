"""The serving engine: tokens in, tokens and fingerprints out; knows neither gRPC nor attestation."""
