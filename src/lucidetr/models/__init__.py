"""The fast DETR: backbone, encoder, queries, decoder, heads, and `DETR` that joins them."""
