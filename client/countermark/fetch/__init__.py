"""Endorsements from the vendors' services, or from a cache of them: `intel` for quotes, `nvidia` for GPUs.

What comes back is signed by the vendors, so none of these services is trusted; TLS only keeps others from watching and
from wasting time. Nothing is fetched unless somebody calls these functions.
"""
