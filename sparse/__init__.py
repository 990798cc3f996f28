"""Block-sparse layouts, products and layers."""
