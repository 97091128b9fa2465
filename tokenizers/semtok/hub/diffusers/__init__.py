"""What an exported pipeline's own code is made of; see ``semtok.hub.export_pipeline``."""
