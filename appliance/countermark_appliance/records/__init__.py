"""Records: committed before execution, provable afterwards. The log store, its signer, and the recorder above them."""
