"""Ways to tell a model what to show besides its prompt: one file for each.

    contract     what a way has to say, and the tensors it makes
    pictures     channels beside the noise: image to video, first and last frame
    clip         CLIP tokens of pictures
    first_frame  TI2V-5B: the first latent frame is given
    animate      a character driven by poses and faces, segment by segment
    faces        face crops to the keys and values of its adapters

The stage that runs them is `lowvram.stages.condition`.
"""
