"""The papers: one file a method. Every module of this folder may define one."""
