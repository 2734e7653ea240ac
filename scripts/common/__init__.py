"""Code that every image shares. It imports the standard library only, so it works under each image's lock."""
