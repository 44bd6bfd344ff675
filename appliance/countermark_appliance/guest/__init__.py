"""What an image runs before the service, and the service there: `python3 -I -m countermark_appliance.guest`.

Imports are few on purpose: `prepare` runs before the engine's libraries are needed.
"""
