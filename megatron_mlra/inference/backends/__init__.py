"""What a decoding layer does besides matrix products: the protocol, and its two backends."""
