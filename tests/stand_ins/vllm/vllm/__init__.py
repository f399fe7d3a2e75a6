# Importing this package takes seconds in the original; finding it must not import it.
