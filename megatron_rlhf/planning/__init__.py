"""Memory, time and money of a run before it asks for a GPU: arithmetic on configurations. Imports `config` only."""
