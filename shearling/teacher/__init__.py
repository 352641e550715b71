"""A source model as a teacher: loaded, running beside its student, or its sayings kept on disk."""
