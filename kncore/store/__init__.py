"""The store: files written whole or not at all, and results under the name of all that decided them."""
