"""The families that are served: a decoder LM, an encoder-decoder and a window classifier."""
