"""The rows that measurements write, and the tables and figures made from them. Imports no sibling package."""
