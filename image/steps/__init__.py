"""The steps of image/build, image/lock and image/disks. Standard library only; whatever else runs comes out of debian.lock."""
