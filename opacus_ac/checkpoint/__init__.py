"""A private run in a file or a folder, and back: what ``PrivacyEngine.save_checkpoint`` and ``load_checkpoint`` do."""
