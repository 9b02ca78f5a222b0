"""A worker's side of the shards: the streams and the exchange over them."""
