"""The cellar: recipe, artifact, records, client, runtime, metrics. Imports no other room."""
