"""The steps of image/build, image/lock and image/disks: standard library only; other tools come out of debian.lock."""
