"""What an image measures to, predicted, signed, published and explained. `countermark-measure` is its command line."""
