"""Memory, time and cost of a run before it uses a GPU: arithmetic on configurations. Imports `config` only."""
