"""Methods of continual training, one a file, over the protocol in continual/method.py."""
