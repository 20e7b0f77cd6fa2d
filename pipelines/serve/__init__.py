"""`asr serve`: live audio and recordings over HTTP and websockets, in the protocols that existing clients speak."""
