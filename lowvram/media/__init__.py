"""Pictures and video in and out of files, through PyAV. No torch here: arrays are numpy uint8 [T, H, W, 3] RGB.

probe.py   what a media file holds, without decoding it
color.py   RGB to BT.709 and back
video.py   frames into a file that is playable at every moment, and out of one
"""
