"""A model at work with a direction taken out, added or looked at: steering, chat, traces, the gentler edit."""
